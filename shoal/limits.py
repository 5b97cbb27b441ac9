"""Every bound of Shoal, with its unit and its reason. At a bound we answer with a typed error that
says what to do; nothing queues, recurses or grows without end.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# -- requests -------------------------------------------------------------------------------------
BODY_BYTES_MAX = 32 * MIB  # one request; what qdrant-client's uploaders send stays far below
CONFIG_BYTES_MAX = 512 * KIB  # of a collection: it is kept in metadata, and read at every start
BATCH_POINTS_MAX = 65_536  # one upsert; keeps a log group, and so a torn tail, bounded
BATCH_OPERATIONS_MAX = 1_000  # one points/batch request
SEARCH_LIMIT_MAX = 10_000  # limit + offset: what one answer may hold and one shard must rank
SCROLL_LIMIT_MAX = 10_000
IDS_MAX = 65_536  # ids in one retrieve, delete or has_id
VECTOR_DIM_MAX = 65_535
VECTORS_PER_POINT_MAX = 64  # named vectors of one collection
SHARD_VECTORS_MAX = 2 * VECTORS_PER_POINT_MAX  # each may be on its way from one model to another
SPARSE_NONZERO_MAX = 65_536  # of one sparse vector
MULTIVECTOR_ROWS_MAX = 1_024  # sub-vectors of one multivector
PAYLOAD_BYTES_MAX = 8 * MIB  # of one point
CHANGE_BYTES_MAX = 256 * MIB  # points x payload of one set or overwrite: it is stored that often
PAYLOAD_DEPTH_MAX = 64  # nesting of one payload: recursion in Python stays far from its limit
FILTER_DEPTH_MAX = 32
FILTER_CONDITIONS_MAX = 4_096  # in one filter, all levels together
MATCH_VALUES_MAX = 65_536  # values of one `any` or `except`
POLYGON_POINTS_MAX = 16_384  # of one geo_polygon, holes included: each is tested against every row
JSON_PATH_PARTS_MAX = 32
TEXTS_PER_REQUEST_MAX = 4_096  # texts to embed in one request
TEXT_BYTES_MAX = 256 * KIB  # of one text
REQUEST_TIMEOUT_S_MAX = 3_600
PENDING_REQUESTS_MAX = 1_024  # in flight in one process before it answers 429

# -- the public gRPC API --------------------------------------------------------------------------
GRPC_CALLS_MAX = 4_096  # open calls of one process, streams that wait for work among them
GRPC_STREAM_SEARCHES_MAX = 128  # of one stream at work; then it is not read until some are answered
GRPC_STREAM_UPSERTS_MAX = 8  # enough to share an fsync; each may hold a whole body
GRPC_BODY_BYTES_MAX = 512 * MIB  # of all requests being answered: bounds the memory
GRPC_MESSAGE_BYTES_TARGET = 1 * MIB  # answers that wait travel together up to here
GRPC_ERROR_BYTES_MAX = 1_024  # of a status message: headers hold 8 KiB, percent-encoding takes 3x

# -- names ----------------------------------------------------------------------------------------
NAME_LENGTH_MAX = 255  # of a collection or vector, in bytes: they become file names
COLLECTIONS_MAX = 1_000
SHARDS_PER_COLLECTION_MAX = 64

# -- the log --------------------------------------------------------------------------------------
LOG_GROUP_BYTES_MAX = 8 * MIB  # one fsync; more waiting writes form the next group
LOG_QUEUE_ENTRIES_MAX = 1_024  # waiting writes of one shard before it answers 429
LOG_QUEUE_BYTES_MAX = 64 * MIB
LOG_RETAIN_BYTES = 64 * MIB  # kept beyond need for replicas that were away; 0 where there is one
LOG_TERMS_MAX = 64  # whose beginnings are known; older ones lie under everybody's committed prefix
DISK_FREE_BYTES_MIN = 64 * MIB  # below, writes get 507: what is left lets a seal or merge finish

# -- segments -------------------------------------------------------------------------------------
SEAL_BYTES = (
    16 * MIB
)  # growing segment: vectors and payload; searched exactly in about 1 ms at 384 d
SEAL_ROWS_MAX = 65_536
FROZEN_SEGMENTS_MAX = 4  # sealed in memory, not yet on disk; more and writes wait
SEGMENT_ROWS_MAX = 2_000_000  # merges stop here
COLUMN_PATHS_MAX = 256  # payload paths with a column, per segment; others are read row by row
KEYWORD_LENGTH_MAX = 256  # characters; longer strings are found by hash and read from the payload
SCAN_FLOATS_MAX = 7_680_000  # rows x dim (20k x 384) up to which exact costs 1.6 ms at most
INDEX_FLOATS_MIN = 768_000  # rows x dim (2k x 384): a scan takes 0.1 ms, a graph about the same
HNSW_EF_MAX = 10_000  # that a search may ask for: a beam holds its rows in memory
HNSW_M_MIN, HNSW_M_MAX = 2, 512  # links of a graph; 0 switches it off, 1 makes Faiss crash
BEAM_WIDTH_MAX = 1_024
FILTER_CACHE_BYTES_MAX = 64 * MIB  # packed bitmaps kept per storage node
VERIFY_ON_OPEN_BYTES_MAX = 4 * 1024 * MIB  # checksummed before ready; the rest by the scrubber

# -- copying replicas -----------------------------------------------------------------------------
TRANSFER_CHUNK_BYTES = MIB  # one message, one checksum; what a damaged one costs to send again
TRANSFERS_MAX = 4  # files that one node sends at once: more would only share its disk
TRANSFERS_WAITING_MAX = 64  # for one of these; more get "busy"
SNAPSHOTS_MAX = 16  # that a node keeps for others: each may hold files that were merged away
SNAPSHOT_IDLE_S = 300.0  # without a fetch; then its files go
MANIFEST_BYTES_MAX = 16 * MIB  # that a node takes from another: about 20,000 segments

# -- the monitor ----------------------------------------------------------------------------------
JOINS_MAX = 16  # new copies on their way in the whole cluster: they compete with requests
JOINS_PER_NODE_MAX = 2  # … that one node receives, or sends as primary
RETURNS_PER_NODE_MAX = 16  # replicas of a node that came back and catch up: mostly tails of logs
ACTIONS_PER_ROUND_MAX = 256  # the rest follows in the next round, about a second later
ASKED_AT_ONCE_MAX = 64  # nodes that the monitor asks for their state at the same time
STORY_ACTIONS_MAX = 200  # that the monitor remembers, for people
ACTIONS_SHOWN_MAX = 50  # … and leaves in the metadata store for all to read: some kilobytes

# -- between nodes --------------------------------------------------------------------------------
RPC_MESSAGE_BYTES_MAX = (
    256 * MIB
)  # one request or answer: above any body (BODY_BYTES_MAX) as columns
RPC_FRAMES_BYTES = 1 * MIB  # small requests travel together up to this; a larger one goes alone
RPC_IN_FLIGHT_MAX = 1_024  # requests of one process to one node before it says Busy
RPC_QUEUE_BYTES_MAX = 256 * MIB  # of those, not yet sent
RPC_SERVER_IN_FLIGHT_MAX = 4_096  # requests of all callers in one node before it says Busy
RPC_SERVER_ANSWER_BYTES_MAX = (
    64 * MIB
)  # finished and not yet taken: then its caller is read no further
BUS_QUEUE_MESSAGES_MAX = 8_192  # waiting for one peer; more are dropped, the replica sends again
BUS_QUEUE_BYTES_MAX = 64 * MIB
COMPLAINT_S = 60.0  # between two lines of the log about messages of one peer that cannot be read
COMPLAINT_PEERS_MAX = 1_024  # peers of which this is remembered
ERROR_TEXT_BYTES_MAX = 2 * KIB  # of an error in gRPC metadata, which holds 8 KiB in all
APPLY_QUEUE_BYTES_MAX = 256 * MIB  # committed and not yet applied; more, and the replica stops
HAND_OVER_S_MAX = 5.0  # that a node which stops waits for others to take over; usually under one
CLOSE_WAIT_S = 1.0  # of a replica that closes, for the acknowledgements of others
STALE_WAIT_S = 0.25  # how long a read waits for a replica to catch up before another is asked

# -- index jobs -----------------------------------------------------------------------------------
INDEX_JOB_FAILURES_MAX = 3  # then the replicas build for themselves
INDEX_JOB_WAIT_S = 5.0  # without any index node before replicas build for themselves
INDEX_ARTIFACT_KEEP_S = 600.0  # an index node keeps what it built so long for replicas to fetch

# -- changing the model of a collection -----------------------------------------------------------
VECTORS_CHANGED_ATTEMPTS = 4  # of one request whose collection changed its vectors meanwhile
SECOND_TEXTS_MAX = 64  # of payloads, that a write embeds for the other model; more are copied later
SECOND_WAIT_S = 1.0  # that a write waits for the other model …
SECOND_WAIT_PER_TEXT_S = 0.02  # … and so long for each text
COPY_POINTS = 64  # that the background copy embeds and writes at once
COPY_PAGE_BYTES_TARGET = 4 * MIB  # payloads that it reads for that
MIGRATIONS_AT_ONCE = 4  # batches of all copies that one coordinator gives to the encoder together
COPY_PAUSE_S_MIN, COPY_PAUSE_S_MAX = 1.0, 30.0  # between two looks while there is nothing to copy
PROGRESS_S = 2.0  # how often a copy says in the metadata store how far it is
DROP_GRACE_S = 10.0  # requests that began before a drop may still read the vectors for so long
RECORDED_QUERIES_MAX = 256  # that a coordinator remembers of a vector that is being changed …
RECORDED_QUERY_BYTES_MAX = 4 * KIB  # … each, with its filter; longer ones are not remembered
GAIN_MAX = 1e6  # of a judgment
COMPARED_QUERIES_MAX = 1_000  # of one comparison: each is embedded and searched twice

# -- the encoder ----------------------------------------------------------------------------------
ENCODER_BATCH_TOKENS_MAX = 2_048  # of one forward pass, padding included: what a query waits for
ENCODER_QUERY_TEXTS_MAX = 8  # of one request; with more it is an import, and queries go before it
ENCODER_QUEUE_TOKENS_MAX = 262_144  # that wait for one group: about a minute of a small one's work
