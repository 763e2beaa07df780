"""What Sluice's processes are made of; nothing here imports `pipelines`."""
