"""The course exercise: is fusing an adapter worth losing its swappability, on this machine?"""
