"""Where frames come from. OpenCV and PyAV are imported when a video or camera is opened."""
