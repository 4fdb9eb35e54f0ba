"""Batches from datasets: sources resident on the device, streamed from worker processes, or drawn; decoding, caches."""
