/* Many clients of one event stream: see clients.py, which compiles and runs it.
 *
 *     clients PORT PATH
 *
 * One thread, one epoll; to 127.0.0.1 only. Each line of the standard input is a
 * command, and has one line for an answer:
 *
 *     come COUNT STOPPED   connect so many, and so many that will not read further
 *                          than the response's head; "ok" when all heads are there
 *     collect EVENTS       "ready"; then, when each that reads has got so many:
 *                          READS FIRST LAST P50 P99 MAX CPU
 *     meet COUNT           connect so many whose streams have events of their own;
 *                          when each has one: P50 P99 MAX, from its connect()
 *     stay MILLISECONDS    "ready"; then what came to those in that time:
 *                          EVENTS FEWEST MOST READS P50 P99 MAX CPU
 *
 * Times are CLOCK_MONOTONIC's nanoseconds; FIRST is the first event's own time, the
 * percentiles are of the latencies of all deliveries, CPU is this process's; FEWEST and
 * MOST are one client's events. An event is {"n":NUMBER,"t":TIME,...}, with no further
 * braces; numbered from 0 in each collect, or in each stream that has its own. What is
 * lost, or comes twice, or out of order, or not within `LIMIT` seconds, ends the
 * program, as does the end of its input. Its clients are of one kind.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { LIMIT = 120, AT_ONCE = 100, SMALL = 4096 };

/* Where in the head, and where in an event, a client is. */
enum { HEAD, OPEN, KEY_N, N, KEY_T, T, CLOSE };

static const char HEAD_END[] = "\r\n\r\n", BEFORE_N[] = "\"n\":", BEFORE_T[] = "\"t\":";

struct client {
  int fd;
  int state, matched; /* characters of what the state waits for */
  int is_stopped;
  int64_t n, t, next;
  int64_t since, got; /* its connect(); events of this stay */
};

/* What the program is at. */
static enum { COLLECT, MEET, STAY } at;

static struct client *clients;
static int count, epoll, left;
static int64_t expected, reads, first, now;
static int64_t *latencies;
static size_t delivered, room;
static struct sockaddr_in address = {.sin_family = AF_INET};
static char request[1024], buffer[1 << 18];

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static int64_t clock_of(clockid_t id) {
  struct timespec at;
  clock_gettime(id, &at);
  return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void note(int64_t latency) {
  if (delivered == room) {
    room = room ? 2 * room : 1 << 16;
    latencies = realloc(latencies, room * sizeof *latencies);
    if (!latencies) fail("realloc");
  }
  latencies[delivered++] = latency;
}

static void event(struct client *c) {
  if (c->n != c->next) {
    fprintf(stderr, "event %lld came where %lld was to come\n", (long long)c->n,
            (long long)c->next);
    exit(1);
  }
  if (at == MEET) {
    if (!c->next++) left--, note(now - c->since);
    return;
  }
  if (at == STAY) {
    c->next++, c->got++, note(now - c->t);
    return;
  }
  if (c->next++ == expected) {
    fprintf(stderr, "an event too many came\n");
    exit(1);
  }
  if (!first || c->t < first) first = c->t;
  latencies[delivered++] = now - c->t;
  if (c->next == expected) left--;
}

/* Takes the next byte of a text; returns whether it was the last one. */
static int match(struct client *c, const char *text, char byte) {
  c->matched = byte == text[c->matched] ? c->matched + 1 : byte == text[0];
  if (text[c->matched]) return 0;
  c->matched = 0;
  return 1;
}

/* Returns whether an event, or the head, ended here. */
static int feed(struct client *c, const char *data, size_t size) {
  const char *end = data + size;
  int has_ended = 0;
  while (data < end) {
    switch (c->state) {
    case HEAD:
      if (match(c, HEAD_END, *data++)) c->state = OPEN, has_ended = 1;
      break;
    case OPEN:
      data = memchr(data, '{', (size_t)(end - data));
      if (!data) return has_ended;
      data++, c->state = KEY_N;
      break;
    case KEY_N:
      if (match(c, BEFORE_N, *data++)) c->state = N, c->n = 0;
      break;
    case N:
      if (*data >= '0' && *data <= '9') c->n = c->n * 10 + *data++ - '0';
      else c->state = KEY_T;
      break;
    case KEY_T:
      if (match(c, BEFORE_T, *data++)) c->state = T, c->t = 0;
      break;
    case T:
      if (*data >= '0' && *data <= '9') c->t = c->t * 10 + *data++ - '0';
      else c->state = CLOSE;
      break;
    case CLOSE:
      data = memchr(data, '}', (size_t)(end - data));
      if (!data) return has_ended;
      data++, c->state = OPEN, has_ended = 1;
      event(c);
      break;
    }
  }
  return has_ended;
}

static void join(struct client *c, int is_stopped) {
  struct epoll_event what = {.events = EPOLLIN, .data.u32 = (uint32_t)(c - clients)};
  int small = SMALL;
  *c = (struct client){.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  if (c->fd < 0) fail("socket");
  int64_t since = clock_of(CLOCK_MONOTONIC);
  if (is_stopped) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  c->is_stopped = is_stopped;
  if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) fail("connect");
  if (send(c->fd, request, strlen(request), MSG_NOSIGNAL) < 0) fail("send");
  c->since = since;
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &what)) fail("epoll_ctl");
}

/* Waits for what comes, so many milliseconds at most, -1: for ever; takes it. Returns
 * whether there was something. */
static int take(int limit) {
  static struct epoll_event events[1024];
  int got = epoll_wait(epoll, events, 1024, limit);
  for (int i = 0; i < got; i++) {
    struct client *c = clients + events[i].data.u32;
    /* Of a head no more than itself is wanted from one that stops then. */
    ssize_t size = recv(c->fd, buffer, c->is_stopped ? 1 : sizeof buffer, 0);
    if (size < 0) fail("recv");
    if (!size) {
      fprintf(stderr, "a stream has ended\n");
      exit(1);
    }
    now = clock_of(CLOCK_MONOTONIC);
    int was = c->state;
    int has_ended = feed(c, buffer, (size_t)size);
    if (was != HEAD) reads += has_ended;
    else if (c->state != HEAD) {
      if (at != MEET) left--;
      if (c->is_stopped) epoll_ctl(epoll, EPOLL_CTL_DEL, c->fd, NULL);
    }
  }
  return got > 0;
}

static void connect_all(int readers, int stopped) {
  int total = count + readers + stopped;
  clients = realloc(clients, (size_t)total * sizeof *clients);
  if (!clients) fail("realloc");
  while (count < total) {
    for (left = 0; left < AT_ONCE && count < total; left++, count++)
      join(clients + count, total - count <= stopped);
    while (left) take(-1);
  }
}

static void come(int readers, int stopped) {
  at = COLLECT;
  connect_all(readers, stopped);
  puts("ok");
}

static int compare(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

/* Sorts the latencies; prints P50 P99 MAX. */
static void print_latencies(void) {
  if (!delivered) note(0);
  qsort(latencies, delivered, sizeof *latencies, compare);
  printf("%lld %lld %lld", (long long)latencies[delivered / 2],
         (long long)latencies[delivered * 99 / 100],
         (long long)latencies[delivered - 1]);
}

static void meet(int readers) {
  at = MEET, delivered = 0;
  connect_all(readers, 0);
  print_latencies();
  puts("");
}

static void stay(int64_t milliseconds) {
  at = MEET; /* what came while nobody read is late by our own fault */
  while (take(0)) continue;
  at = STAY, reads = 0, delivered = 0;
  for (int i = 0; i < count; i++) clients[i].got = 0;
  puts("ready");
  int64_t cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID);
  int64_t end = clock_of(CLOCK_MONOTONIC) + milliseconds * 1000000;
  for (int64_t rest; (rest = end - clock_of(CLOCK_MONOTONIC)) > 0;)
    take((int)((rest + 999999) / 1000000));
  cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  int64_t fewest = INT64_MAX, most = 0;
  for (int i = 0; i < count; i++) {
    if (clients[i].got < fewest) fewest = clients[i].got;
    if (clients[i].got > most) most = clients[i].got;
  }
  printf("%zu %lld %lld %lld ", delivered, (long long)fewest, (long long)most,
         (long long)reads);
  print_latencies();
  printf(" %lld\n", (long long)cpu);
  at = MEET;
}

static void collect(int64_t events) {
  left = 0;
  for (int i = 0; i < count; i++)
    if (!clients[i].is_stopped) clients[i].next = 0, left++;
  room = (size_t)left * (size_t)events;
  latencies = realloc(latencies, room * sizeof *latencies);
  if (!latencies) fail("realloc");
  /* Its pages are not to be made while it measures. */
  memset(latencies, 1, room * sizeof *latencies);
  expected = events, reads = first = 0, delivered = 0;
  puts("ready");
  int64_t cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID);
  while (left) take(-1);
  cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  int64_t last = now;
  printf("%lld %lld %lld ", (long long)reads, (long long)first, (long long)last);
  print_latencies();
  printf(" %lld\n", (long long)cpu);
}

int main(int argc, char **argv) {
  char line[100];
  int readers, stopped;
  long long events;
  struct rlimit limit;
  if (argc != 3) return 2;
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  address.sin_port = htons((uint16_t)atoi(argv[1]));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  snprintf(request, sizeof request,
           "GET %s HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n",
           argv[2]);
  epoll = epoll_create1(EPOLL_CLOEXEC);
  if (epoll < 0) fail("epoll_create1");
  setlinebuf(stdout);
  while (fgets(line, sizeof line, stdin)) {
    alarm(LIMIT);
    if (sscanf(line, "come %d %d", &readers, &stopped) == 2) come(readers, stopped);
    else if (sscanf(line, "collect %lld", &events) == 1) collect(events);
    else if (sscanf(line, "meet %d", &readers) == 1) meet(readers);
    else if (sscanf(line, "stay %lld", &events) == 1) stay(events);
    else return 2;
    alarm(0);
  }
  return 0;
}
