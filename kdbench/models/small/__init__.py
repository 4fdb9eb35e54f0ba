"""Small networks for images of 8x8 to 32x32 pixels: CNN, MLP, ResNet, ViT."""
