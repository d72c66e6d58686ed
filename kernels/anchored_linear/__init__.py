"""Matrix memory: shared engine in `anchored_mlp`, and the triangular solve of the plain linear case."""
