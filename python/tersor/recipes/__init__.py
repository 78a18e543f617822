"""Several steps of compression as one thing: written down, checked as a whole, run with one
command, and reported stage by stage."""
