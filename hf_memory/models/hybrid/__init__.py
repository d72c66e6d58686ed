"""A pretrained decoder in which some attention layers are replaced by, or work beside, a memory."""
