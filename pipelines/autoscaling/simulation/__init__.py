"""A day of load on a simulated cluster: the waiting time and the GPU-hours of one way of scaling."""
