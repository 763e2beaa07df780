"""How well the guard judges labelled images under a policy: `sluice evaluate` and `sluice calibrate`."""
