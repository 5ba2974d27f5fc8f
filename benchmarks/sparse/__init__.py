"""What do sparse weights with real storage hold, how fast are they, how well do they train?"""
