"""Policies: documents, prompts, versions and rollouts.

Versions and rollouts pass through four layers. `PolicyRegistry` (registry.py) reads and writes the policy bucket, the
source of truth. `PolicyRedisCache` (redis_cache.py) is the copy that all processes share, and announces changes.
`PolicyCache` (cache.py) is the copy in the memory of one process; it chooses the version of each submission.
`PolicyService` (service.py) makes changes: it writes the bucket, then the caches.
"""
