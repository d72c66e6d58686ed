"""Memory slots on the unit sphere, each trained by projected gradient steps while it reads (Lattice)."""
