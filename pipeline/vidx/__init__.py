"""vidx: index video archives once; search, ask and read them ever after.

import vidx

vidx.index("~/videos", "./vidx-archive")
archive = vidx.open("./vidx-archive")
for moment in archive.search("a red bus"):
    print(moment.uri, moment.start_seconds, moment.end_seconds, moment.score)

This package holds nothing itself: what is here is made in pipeline.api and the modules that it names.
"""

from pipeline.api import Archive
from pipeline.api_index import index
from pipeline.api_results import Moments, Videos
from pipeline.query import Term
from pipeline.stored_frames import Frames
from storage.errors import ArchiveError, ClusterError, UsageError, VidxError

open = Archive.open

__all__ = [
    "Archive",
    "ArchiveError",
    "ClusterError",
    "Frames",
    "Moments",
    "Term",
    "UsageError",
    "Videos",
    "VidxError",
    "index",
    "open",
]
