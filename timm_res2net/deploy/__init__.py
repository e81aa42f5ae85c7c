"""Fast inference: fold norms, compile, and measure beside timm."""
