"""The routes of ModelsLab's enterprise realtime img2img contract."""
