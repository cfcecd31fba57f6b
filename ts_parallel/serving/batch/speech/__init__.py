"""Speech to text as Whisper does it: sound files, prompts, recordings longer than a window, transcripts."""
