"""A whole sampling loop as data: recorded once on the host, run by the workers."""
