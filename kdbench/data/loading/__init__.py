"""Loading: batches from datasets in device memory, from worker processes, or from generators; decoding and caches."""
