"""Which weights matter: gradients on the path from original to quantized weights, and scores made of them."""
