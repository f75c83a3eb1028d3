"""The web page of one workstation: it shows a model's predictions and corrects masks by points.

``server.build`` makes the ASGI application. ``guard`` checks every request, ``uploads`` reads its files,
``desk.Desk`` keeps the images in memory, ``worker.Worker`` runs the model in one thread, and
``reading.Reader`` predicts. ``page/`` holds the HTML, script and styles.

The room may import ``serving`` and the rooms below it. Uploaded images never reach the disk.
"""
