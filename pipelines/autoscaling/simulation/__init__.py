"""A day of load on a simulated cluster: what a way of scaling makes of it in waiting time and GPU-hours."""
