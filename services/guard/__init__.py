"""The guard: a vision-language model that assesses images, on an SGLang server."""
