"""Functions of slime and miles."""
