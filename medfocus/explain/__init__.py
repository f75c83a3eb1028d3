"""Where a prediction looked. It may import methods, focus, clip and all below."""
