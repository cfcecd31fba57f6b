"""Images: how they become pixels, and which objects and areas are found in them."""
