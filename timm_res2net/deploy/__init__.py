"""Fast inference: fold norms, compile, quantize, export to files, and measure beside timm."""
