"""Explanations: a map of the image parts behind a prediction.

``explain.explain`` picks the explanation that suits a fitted method: gradient-weighted attention
(``transformer``), Grad-CAM (``grad_cam``) or occlusion (``occlusion``). ``maps`` measures the share of a map
inside a region. This room may import methods, focus, clip and all lower rooms.
"""
