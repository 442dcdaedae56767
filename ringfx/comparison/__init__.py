"""A model split over ranks of this machine, compared with itself unsplit: ``ringfx.verify``."""
