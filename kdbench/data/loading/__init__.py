"""Batches from datasets: resident on the device, streamed from worker processes, or generated; decoding and caches."""
