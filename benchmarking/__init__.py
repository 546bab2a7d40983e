"""How fast the networks are on this machine, and how much of that the samplers and the training get."""
