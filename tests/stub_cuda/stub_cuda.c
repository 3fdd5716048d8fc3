/* A stub of the CUDA driver (libcuda.so.1) for tests on machines without a GPU.
 *
 * It launches no kernel and moves no byte over a bus: device memory is host memory. What it proves is plumbing, and it is
 * stricter there than a real device usually is:
 *  - streams are lazy: an asynchronous copy happens only when its stream (or a later event of it) is synchronized, so a
 *    missing synchronization shows as wrong bytes;
 *  - every copy is checked against the live allocations; freed memory is overwritten first;
 *  - the default streams wait for those not made non-blocking, and for no others;
 *  - calls that need a current context fail without one, and are violations in one that is not ours; everything made is counted until it is freed.
 * Tests add work to a stream with stub_enqueue, count with stub_live, and make the k-th call of a function fail with
 * stub_fail. Device: STUB_CUDA_INTEGRATED=1 makes it integrated, STUB_CUDA_MEMORY is its memory in bytes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int CUresult;
typedef int CUdevice;
typedef struct Context *CUcontext;
typedef struct Stream *CUstream;
typedef struct Event *CUevent;
typedef struct Graph *CUgraph;
typedef struct Graph *CUgraphExec;
typedef uint64_t CUdeviceptr;
typedef void (*HostFunction)(void *);

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901
};

/* The contexts of this thread, the current one last. Two more than the primary one: an application's own. */
struct Context { int number; };
static struct Context primary = {0}, foreign[2] = {{1}, {2}};
static atomic_int primary_count;
static __thread CUcontext stack[32];
static __thread int depth;

/* ---- counters, the call log, failure injection -------------------------------------------------------------------- */

enum { DEVICE_MEMORY, HOST_MEMORY, STREAMS, EVENTS, GRAPHS, GRAPH_EXECS, CONTEXT_PUSHES, PRIMARY_RETAINS, KINDS };
static atomic_long live[KINDS];
static atomic_long made[KINDS];
static atomic_long violations;
static atomic_long device_bytes;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static char call_log[1 << 16];
static int logging;
static struct { char name[64]; long countdown; int code; int sticky; } failure;
static atomic_int sticky_code;
static int initialized;

long stub_live(int kind) { return live[kind]; }
long stub_made(int kind) { return made[kind]; }
long stub_violations(void) { return violations; }
long stub_device_bytes(void) { return device_bytes; }

void stub_log(int on) {
    pthread_mutex_lock(&log_lock);
    logging = on;
    if (on) call_log[0] = 0;
    pthread_mutex_unlock(&log_lock);
}
const char *stub_log_text(void) { return call_log; }

/* Make the k-th call (from 1, counted from now) of a function fail; sticky: every call after it fails too. */
void stub_fail(const char *name, long k, int code, int sticky) {
    pthread_mutex_lock(&log_lock);
    snprintf(failure.name, sizeof failure.name, "%s", name);
    failure.countdown = k;
    failure.code = code;
    failure.sticky = sticky;
    sticky_code = 0;
    pthread_mutex_unlock(&log_lock);
}

static CUresult called(const char *name) {
    CUresult code = sticky_code;
    pthread_mutex_lock(&log_lock);
    if (logging && strlen(call_log) + strlen(name) + 2 < sizeof call_log) {
        strcat(call_log, name);
        strcat(call_log, "\n");
    }
    if (failure.countdown > 0 && !strcmp(failure.name, name) && --failure.countdown == 0) {
        code = failure.code;
        if (failure.sticky) sticky_code = code;
    }
    pthread_mutex_unlock(&log_lock);
    return code;
}

static void count(int kind, long n) {
    live[kind] += n;
    if (n > 0) made[kind] += n;
}

#define BEGIN()                                     \
    do {                                            \
        CUresult injected = called(__func__);       \
        if (injected) return injected;              \
    } while (0)
#define NEEDS_CONTEXT()                                                                       \
    do {                                                                                      \
        if (!depth) return INVALID_CONTEXT;                                                   \
        if (stack[depth - 1] != &primary) violations++; /* work in a context of somebody else */ \
    } while (0)

/* ---- device and contexts ------------------------------------------------------------------------------------------ */

static long setting(const char *name, long fallback) { return getenv(name) ? atol(getenv(name)) : fallback; }

CUresult cuInit(unsigned flags) { BEGIN(); initialized = 1; return flags ? INVALID_VALUE : SUCCESS; }
CUresult cuDriverGetVersion(int *version) { BEGIN(); *version = (int)setting("STUB_CUDA_VERSION", 13000); return SUCCESS; }
CUresult cuDeviceGetCount(int *n) {
    BEGIN();
    if (!initialized) return NOT_INITIALIZED;
    *n = (int)setting("STUB_CUDA_DEVICES", 1);
    return SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int index) {
    BEGIN();
    if (!initialized) return NOT_INITIALIZED;
    if (index < 0 || index >= setting("STUB_CUDA_DEVICES", 1)) return 101;
    *device = index;
    return SUCCESS;
}
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    (void)device;
    BEGIN();
    snprintf(name, (size_t)size, "Stub (no GPU)");
    return SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    (void)device;
    BEGIN();
    switch (attribute) {
    case 75: *value = 8; break;                                        /* COMPUTE_CAPABILITY_MAJOR */
    case 76: *value = 7; break;                                        /* COMPUTE_CAPABILITY_MINOR */
    case 16: *value = 8; break;                                        /* MULTIPROCESSOR_COUNT */
    case 18: *value = (int)setting("STUB_CUDA_INTEGRATED", 0); break;  /* INTEGRATED */
    case 19: *value = 1; break;                                        /* CAN_MAP_HOST_MEMORY */
    case 41: *value = 1; break;                                        /* UNIFIED_ADDRESSING */
    default: *value = 0;
    }
    return SUCCESS;
}
CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    (void)device;
    BEGIN();
    *major = 8;
    *minor = 7;
    return SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    (void)device;
    BEGIN();
    *bytes = (size_t)setting("STUB_CUDA_MEMORY", 1L << 30);
    return SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    (void)device;
    BEGIN();
    count(PRIMARY_RETAINS, 1);
    primary_count++;
    *context = &primary;
    return SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    (void)device;
    CUresult injected = called(__func__);
    count(PRIMARY_RETAINS, -1);
    if (--primary_count < 0) violations++;
    return injected;
}
/* A broken context can still be pushed, popped and asked for: these four do not repeat a sticky error. */
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    CUresult injected = called(__func__);
    if (injected && injected != sticky_code) return injected;
    if ((context == &primary && primary_count < 1) || depth >= 32) return INVALID_CONTEXT;
    stack[depth++] = context;
    count(CONTEXT_PUSHES, 1);
    return SUCCESS;
}
CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    CUresult injected = called(__func__);
    if (!depth) return INVALID_CONTEXT;
    depth--;
    if (context) *context = stack[depth];
    count(CONTEXT_PUSHES, -1);
    return injected == sticky_code ? SUCCESS : injected;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    CUresult injected = called(__func__);
    if (injected && injected != sticky_code) return injected;
    if (!depth) { depth = 1; count(CONTEXT_PUSHES, 1); }
    stack[depth - 1] = context;
    if (!context) { depth--; count(CONTEXT_PUSHES, -1); }
    return SUCCESS;
}
/* What an application does with a context of its own: push number 1 or 2, or pop with 0. */
void stub_application_context(int number) {
    if (number) { stack[depth++] = &foreign[number - 1]; count(CONTEXT_PUSHES, 1); }
    else { depth--; count(CONTEXT_PUSHES, -1); }
}
/* The contexts of this thread as digits, the current one last; the primary one is 0. */
long stub_contexts(void) {
    long digits = 1;
    for (int i = 0; i < depth; i++) digits = digits * 10 + stack[i]->number;
    return digits;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    CUresult injected = called(__func__);
    *context = depth ? stack[depth - 1] : NULL;
    return injected == sticky_code ? SUCCESS : injected;
}
CUresult cuCtxGetDevice(CUdevice *device) { BEGIN(); NEEDS_CONTEXT(); *device = 0; return SUCCESS; }
CUresult cuCtxGetApiVersion(CUcontext context, unsigned *version) { (void)context; BEGIN(); *version = 3020; return SUCCESS; }

/* ---- memory ------------------------------------------------------------------------------------------------------- */

struct Allocation { void *base; size_t size; int kind; struct Allocation *next; };
static struct Allocation *allocations;
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;

static CUresult allocate(void **out, size_t size, int kind) {
    if (!size) return INVALID_VALUE;
    pthread_mutex_lock(&memory_lock);
    CUresult result = OUT_OF_MEMORY;
    if ((long)size + device_bytes <= setting("STUB_CUDA_MEMORY", 1L << 30)) {
        struct Allocation *a = malloc(sizeof *a);
        a->base = aligned_alloc(256, (size + 255) & ~(size_t)255);
        memset(a->base, 0xA5, size);  /* never zero: nobody may rely on fresh memory */
        a->size = size;
        a->kind = kind;
        a->next = allocations;
        allocations = a;
        device_bytes += (long)size;
        count(kind, 1);
        *out = a->base;
        result = SUCCESS;
    }
    pthread_mutex_unlock(&memory_lock);
    return result;
}

static CUresult release(void *base, int kind) {
    CUresult result = INVALID_VALUE;
    pthread_mutex_lock(&memory_lock);
    for (struct Allocation **at = &allocations; *at; at = &(*at)->next)
        if ((*at)->base == base && (*at)->kind == kind) {
            struct Allocation *gone = *at;
            *at = gone->next;
            memset(gone->base, 0xDD, gone->size);
            device_bytes -= (long)gone->size;
            count(kind, -1);
            free(gone->base);
            free(gone);
            result = SUCCESS;
            break;
        }
    pthread_mutex_unlock(&memory_lock);
    if (result) violations++;  /* freed twice, or never allocated */
    return result;
}

static int is_live(const void *start, size_t size, int device_only) {
    int found = 0;
    pthread_mutex_lock(&memory_lock);
    for (struct Allocation *a = allocations; a && !found; a = a->next)
        found = (char *)start >= (char *)a->base && (char *)start + size <= (char *)a->base + a->size &&
                (!device_only || a->kind == DEVICE_MEMORY || a->kind == HOST_MEMORY);
    pthread_mutex_unlock(&memory_lock);
    return found;
}

CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
    BEGIN();
    NEEDS_CONTEXT();
    return allocate((void **)out, size, DEVICE_MEMORY);
}
CUresult cuMemFree_v2(CUdeviceptr pointer) {
    CUresult injected = called(__func__);
    NEEDS_CONTEXT();
    CUresult result = release((void *)pointer, DEVICE_MEMORY);
    return injected ? injected : result;
}
CUresult cuMemHostAlloc(void **out, size_t size, unsigned flags) {
    (void)flags;
    BEGIN();
    NEEDS_CONTEXT();
    return allocate(out, size, HOST_MEMORY);
}
CUresult cuMemFreeHost(void *pointer) {
    CUresult injected = called(__func__);
    NEEDS_CONTEXT();
    CUresult result = release(pointer, HOST_MEMORY);
    return injected ? injected : result;
}
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *out, void *host, unsigned flags) {
    (void)flags;
    BEGIN();
    NEEDS_CONTEXT();
    *out = (CUdeviceptr)host;
    return is_live(host, 1, 0) ? SUCCESS : INVALID_VALUE;
}
CUresult cuPointerGetAttribute(void *out, int attribute, CUdeviceptr pointer) {
    BEGIN();
    NEEDS_CONTEXT();
    if (!is_live((void *)pointer, 1, 1)) return INVALID_VALUE;
    if (attribute == 3) *(CUdeviceptr *)out = pointer;                          /* DEVICE_POINTER */
    else if (attribute == 9) *(int *)out = (int)setting("STUB_CUDA_ORDINAL", 0); /* DEVICE_ORDINAL */
    else return INVALID_VALUE;
    return SUCCESS;
}
CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    BEGIN();
    NEEDS_CONTEXT();
    *total = (size_t)setting("STUB_CUDA_MEMORY", 1L << 30);
    *available = *total - (size_t)device_bytes;
    return SUCCESS;
}

/* ---- streams and events ------------------------------------------------------------------------------------------- */

enum { COPY, CALL, RECORD, WAIT };
struct Point { CUstream stream; long position; };
struct Operation {
    int what;
    void *target;
    const void *source;
    size_t size;
    int target_on_device, source_on_device;
    HostFunction function;
    void *argument;
    CUevent event;
    struct Point points[64];  /* of the event when the wait was given: recording it again changes nothing */
    int count;
    struct Operation *next;
};
struct Stream {
    struct Stream *next;
    int blocking;  /* ordered with the default stream */
    pthread_mutex_t lock;
    struct Operation *first, *last;
    long queued, done;
    CUgraph capturing;
    int capture_broken;
};
struct Event { struct Point points[64]; int count; double time_ms; int timing; };
struct Graph { struct Operation *first, *last; };

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void drain(CUstream stream, long until);

static CUstream streams;
static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER;

/* 0, 1 and 2: the default streams. Work on them is done at once here, after that of all blocking streams. */
static int is_default(CUstream stream) { return (uintptr_t)stream <= 2; }

static int exists(CUstream stream) {
    int found = 0;
    pthread_mutex_lock(&streams_lock);
    for (CUstream s = streams; s && !found; s = s->next) found = s == stream;
    pthread_mutex_unlock(&streams_lock);
    return found;
}

/* Where streams are now: one of them, or for 0 all blocking ones, or with `all` every one. */
static int points_of(CUstream stream, int all, struct Point *points) {
    int n = 0;
    pthread_mutex_lock(&streams_lock);
    for (CUstream s = streams; s && n < 64; s = s->next)
        if (all || s == stream || (is_default(stream) && s->blocking)) points[n++] = (struct Point){s, s->queued};
    pthread_mutex_unlock(&streams_lock);
    return n;
}

static void reach(struct Point *points, int n) {
    for (int i = 0; i < n; i++)
        if (exists(points[i].stream)) drain(points[i].stream, points[i].position);
}

static int is_reached(CUevent event) {
    for (int i = 0; i < event->count; i++)
        if (exists(event->points[i].stream) && event->points[i].stream->done < event->points[i].position) return 0;
    return 1;
}

static void perform(struct Operation *op) {
    switch (op->what) {
    case COPY:
        if ((op->target_on_device && !is_live(op->target, op->size, 1)) ||
            (op->source_on_device && !is_live(op->source, op->size, 1)))
            violations++;  /* a copy to or from memory that is not (any more) allocated */
        else
            memcpy(op->target, op->source, op->size);
        break;
    case CALL: op->function(op->argument); break;
    case RECORD: op->event->time_ms = now_ms(); break;
    case WAIT:
        reach(op->points, op->count);
        break;
    }
}

/* Run the operations of a stream in order, up to and including number `until`. */
static void drain(CUstream stream, long until) {
    pthread_mutex_lock(&stream->lock);
    while (stream->first && stream->done < until) {
        struct Operation *op = stream->first;
        stream->first = op->next;
        if (!stream->first) stream->last = NULL;
        if (!sticky_code) perform(op);  /* a lost GPU does nothing more */
        stream->done++;
        free(op);
    }
    pthread_mutex_unlock(&stream->lock);
}

static void append(struct Operation **first, struct Operation **last, struct Operation op) {
    struct Operation *copy = malloc(sizeof *copy);
    *copy = op;
    copy->next = NULL;
    if (*last) (*last)->next = copy; else *first = copy;
    *last = copy;
}

static CUresult enqueue(CUstream stream, struct Operation op) {
    if (is_default(stream)) {
        struct Point points[64];
        reach(points, points_of(stream, 0, points));
        perform(&op);
        return SUCCESS;
    }
    pthread_mutex_lock(&stream->lock);
    if (stream->capturing) append(&stream->capturing->first, &stream->capturing->last, op);
    else { append(&stream->first, &stream->last, op); stream->queued++; }
    pthread_mutex_unlock(&stream->lock);
    return SUCCESS;
}

/* What a kernel launch would be: call function(argument) when the stream gets there. */
CUresult stub_enqueue(CUstream stream, HostFunction function, void *argument) {
    CUresult injected = called("kernel");
    if (injected) return injected;
    if (!depth) return INVALID_CONTEXT;
    struct Operation op = {CALL, .function = function, .argument = argument};
    return enqueue(stream, op);
}
int stub_is_live(const void *start, size_t size) { return is_live(start, size, 1); }

CUresult cuStreamCreate(CUstream *out, unsigned flags) {
    BEGIN();
    NEEDS_CONTEXT();
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    *out = calloc(1, sizeof **out);
    pthread_mutex_init(&(*out)->lock, &recursive);
    (*out)->blocking = !(flags & 1);
    pthread_mutex_lock(&streams_lock);
    (*out)->next = streams;
    streams = *out;
    pthread_mutex_unlock(&streams_lock);
    count(STREAMS, 1);
    return SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream stream) {
    CUresult injected = called(__func__);
    NEEDS_CONTEXT();
    drain(stream, stream->queued);
    pthread_mutex_lock(&streams_lock);
    for (CUstream *at = &streams; *at; at = &(*at)->next)
        if (*at == stream) { *at = stream->next; break; }
    pthread_mutex_unlock(&streams_lock);
    free(stream);
    count(STREAMS, -1);
    return injected;
}
CUresult cuStreamSynchronize(CUstream stream) {
    BEGIN();
    NEEDS_CONTEXT();
    if (is_default(stream)) {
        struct Point points[64];
        reach(points, points_of(stream, 0, points));
        return SUCCESS;
    }
    if (stream->capturing) { stream->capture_broken = 1; return CAPTURE_UNSUPPORTED; }
    drain(stream, stream->queued);
    return SUCCESS;
}
CUresult cuCtxSynchronize(void) {
    struct Point points[64];
    BEGIN();
    NEEDS_CONTEXT();
    reach(points, points_of(NULL, 1, points));
    return SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    (void)flags;
    BEGIN();
    NEEDS_CONTEXT();
    struct Operation op = {WAIT, .event = event, .count = event->count};
    memcpy(op.points, event->points, sizeof op.points);
    return enqueue(stream, op);
}
CUresult cuEventCreate(CUevent *out, unsigned flags) {
    BEGIN();
    NEEDS_CONTEXT();
    *out = calloc(1, sizeof **out);
    (*out)->timing = !(flags & 2);
    count(EVENTS, 1);
    return SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent event) {
    CUresult injected = called(__func__);
    NEEDS_CONTEXT();
    reach(event->points, event->count);
    free(event);
    count(EVENTS, -1);
    return injected;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    BEGIN();
    NEEDS_CONTEXT();
    struct Operation op = {RECORD, .event = event};
    if (is_default(stream)) op.event->time_ms = now_ms();
    else enqueue(stream, op);
    event->count = points_of(stream, 0, event->points);
    return SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
    BEGIN();
    NEEDS_CONTEXT();
    reach(event->points, event->count);
    return SUCCESS;
}
CUresult cuEventQuery(CUevent event) {
    BEGIN();
    return is_reached(event) ? SUCCESS : NOT_READY;
}
CUresult cuEventElapsedTime_v2(float *ms, CUevent from, CUevent to) {
    BEGIN();
    if (!from->timing || !to->timing) return INVALID_HANDLE;
    if (!is_reached(from) || !is_reached(to)) return NOT_READY;
    *ms = (float)(to->time_ms - from->time_ms);
    return SUCCESS;
}
CUresult cuEventElapsedTime(float *ms, CUevent from, CUevent to) { return cuEventElapsedTime_v2(ms, from, to); }

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t size, CUstream stream) {
    BEGIN();
    NEEDS_CONTEXT();
    struct Operation op = {COPY, (void *)target, source, size, .target_on_device = 1};
    return enqueue(stream, op);
}
CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t size, CUstream stream) {
    BEGIN();
    NEEDS_CONTEXT();
    struct Operation op = {COPY, target, (void *)source, size, .source_on_device = 1};
    return enqueue(stream, op);
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    BEGIN();
    NEEDS_CONTEXT();
    struct Operation op = {COPY, (void *)target, (void *)source, size, .target_on_device = 1, .source_on_device = 1};
    return enqueue(stream, op);
}

/* ---- graphs ------------------------------------------------------------------------------------------------------- */

CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) {
    (void)mode;
    BEGIN();
    NEEDS_CONTEXT();
    if (stream->capturing) return INVALID_VALUE;
    stream->capturing = calloc(1, sizeof(struct Graph));
    stream->capture_broken = 0;
    return SUCCESS;
}
static void destroy(CUgraph graph) {
    for (struct Operation *op = graph->first, *next; op; op = next) { next = op->next; free(op); }
    free(graph);
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph *out) {
    CUresult injected = called(__func__);
    NEEDS_CONTEXT();
    CUgraph graph = stream->capturing;
    if (!graph) return INVALID_VALUE;
    stream->capturing = NULL;
    *out = NULL;
    if (injected || stream->capture_broken) {
        destroy(graph);
        return injected ? injected : CAPTURE_INVALIDATED;
    }
    count(GRAPHS, 1);
    *out = graph;
    return SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
    (void)flags;
    BEGIN();
    *out = calloc(1, sizeof **out);
    for (struct Operation *op = graph->first; op; op = op->next) append(&(*out)->first, &(*out)->last, *op);
    count(GRAPH_EXECS, 1);
    return SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    CUresult injected = called(__func__);
    destroy(graph);
    count(GRAPHS, -1);
    return injected;
}
CUresult cuGraphExecDestroy(CUgraphExec graph) {
    CUresult injected = called(__func__);
    destroy(graph);
    count(GRAPH_EXECS, -1);
    return injected;
}
CUresult cuGraphLaunch(CUgraphExec graph, CUstream stream) {
    BEGIN();
    NEEDS_CONTEXT();
    for (struct Operation *op = graph->first; op; op = op->next) enqueue(stream, *op);
    return SUCCESS;
}

/* ---- names and entry points --------------------------------------------------------------------------------------- */

static const struct { int code; const char *name, *text; } names[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
};
CUresult cuGetErrorName(CUresult code, const char **out) {
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == code) { *out = names[i].name; return SUCCESS; }
    return INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult code, const char **out) {
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == code) { *out = names[i].text; return SUCCESS; }
    return INVALID_VALUE;
}
CUresult cuGetProcAddress_v2(const char *symbol, void **out, int version, uint64_t flags, int *status) {
    (void)version;
    (void)flags;
    Dl_info self;
    static const char *suffixes[] = {"_v2", ""};
    char name[128];
    *out = NULL;
    if (status) *status = 1;  /* SYMBOL_NOT_FOUND */
    if (!dladdr((void *)cuInit, &self)) return NOT_FOUND;
    void *handle = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    for (size_t i = 0; i < 2 && !*out; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *out = dlsym(handle, name);
    }
    if (status && *out) *status = 0;
    return *out ? SUCCESS : NOT_FOUND;
}
CUresult cuGetProcAddress(const char *symbol, void **out, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, out, version, flags, NULL);
}
