"""What do ranks send, and what does it cost in loss?"""
