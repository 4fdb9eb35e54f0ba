"""Several runs in one process: the dispatcher that alternates their steps, joint steps, and stacked networks."""
