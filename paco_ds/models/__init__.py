"""Networks: backbones, experts, heads, and the recogniser that joins them."""
