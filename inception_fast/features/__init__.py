"""Features of many images: sources of images, decoding in worker processes, the model, shards of parquet."""
