"""Make views, the input of CLIP, from images and their regions by visual prompts.

``view.view`` makes every view. ``modes.FOCUS`` holds the prompts, ``augment.augmentation`` draws random
changes of image and mask, and ``controls.CONTROLS`` test whether the right region matters. This room may
import masks, clip and all lower rooms.
"""
