"""Terms on intermediate features: feature maps, summaries of maps, feature vectors, and auxiliary heads on features."""
