"""What the commands of `hf-memory` compute; `hf_memory.cli` parses and prints."""
