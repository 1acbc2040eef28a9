"""Progress bars; where stderr is no terminal, a line every half minute in place of a bar."""

import sys

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class Bar(tqdm):
    """A tqdm bar that a log file can hold."""

    def __init__(self, *args, **options):
        if not sys.stderr.isatty():
            options |= {"mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES}
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file):
        """What prints the state of the bar: in place on a terminal, as a line elsewhere."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(text):
            if text.strip():
                file.write(f"{text.strip()}\n")
                file.flush()

        return print_line
