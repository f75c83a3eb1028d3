"""Visual prompts: an image and its region become a view, the input of CLIP.

``view.view`` makes every view. ``modes.FOCUS`` holds the prompts, ``crop.crop_box`` draws random crops, and
``controls.CONTROLS`` test whether the right region matters. This room may import masks, clip and all
lower rooms.
"""
