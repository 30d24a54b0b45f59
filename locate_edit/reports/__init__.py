"""What an edit did: measured, attacked, compared with others, and written down for somebody who was not there."""
