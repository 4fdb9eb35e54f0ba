"""Several runs in one process: a dispatcher that alternates steps, joint steps, stacked networks."""
