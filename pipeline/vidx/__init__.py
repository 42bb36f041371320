"""vidx: index video archives; search them and ask questions about them.

import vidx

vidx.index("~/videos", "./vidx-archive")
archive = vidx.open("./vidx-archive")
for moment in archive.search("a red bus"):
    print(moment.uri, moment.start_seconds, moment.end_seconds, moment.score)

The code is in pipeline.api.
"""

from pipeline.api.index_videos import index
from pipeline.api.open_archive import OpenArchive
from pipeline.api.sequences import Moments, Videos
from pipeline.api.stored_frames import Frames
from pipeline.ask.query import Term
from storage.errors import ArchiveError, ClusterError, UsageError, VidxError

Archive = OpenArchive
open = OpenArchive.open

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
