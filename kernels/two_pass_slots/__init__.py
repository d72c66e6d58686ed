"""Two slot memories read one behind the other (Trellis): reference, chunk and decode forms."""
