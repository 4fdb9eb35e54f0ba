"""Terms on intermediate features: feature maps, summaries of maps, feature vectors, and heads on features."""
