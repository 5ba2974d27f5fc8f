"""How far are predicted training steps from published ones?"""
