"""Is a finished picture safe for work?"""
