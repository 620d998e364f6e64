"""`python -m rats_video.cli`: what a launcher starts."""

from rats_video.cli.app import main

main()
