"""Training an expert or the router, alone: reads its own shards, writes its own artifact."""
