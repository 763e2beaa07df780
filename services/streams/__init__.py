"""The stream: the transport interface, its Kafka and Redis Streams adapters, and the formats read from it."""
