/* The least that a broadcast costs: raw epoll and send(2), in C. See handover.py.
 *
 *     broadcaster FD
 *
 * FD is a listening socket, non-blocking. One thread; an event is encoded once. Paced
 * events are a send(2) each for each client; what is published at once is joined, up to
 * `JOINED` bytes for one send(2). No keepalive, no history, no limit on what waits for
 * a slow client; requests are those that handover.py makes.
 *
 *     GET /events
 *     GET /publish?count=COUNT&rate=RATE&size=SIZE   answers at once; rate 0: at once
 *     GET /state                                     {"pid": ..., "subscribers": ...}
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { JOINED = 1 << 16, LARGEST = 1 << 14, REQUEST = 1024 };

struct client {
  int fd, place, size;          /* place: among the subscribers, -1 if it is none */
  char request[REQUEST], *rest; /* rest: what the kernel has not taken */
  size_t rest_size;
  int is_waiting;
};

static struct client **subscribers;
static int count, epoll;
static struct {
  long n, count, size;
  int64_t next, step; /* step 0: at once */
} job;

static const char HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n: ok\n\n\r\n";

static int64_t monotonic(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void wait_for_room(struct client *c, int is_waiting) {
  struct epoll_event what = {.events = EPOLLIN | (is_waiting ? EPOLLOUT : 0),
                             .data.ptr = c};
  if (c->is_waiting != is_waiting) epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &what);
  c->is_waiting = is_waiting;
}

static void leave(struct client *c) {
  if (c->place >= 0) {
    subscribers[c->place] = subscribers[--count];
    subscribers[c->place]->place = c->place;
  }
  close(c->fd);
  free(c->rest);
  free(c);
}

/* An error is seen by epoll, too, and acted upon there. */
static size_t sent(struct client *c, const char *data, size_t size) {
  ssize_t taken = send(c->fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (taken >= 0) return (size_t)taken;
  return errno == EAGAIN ? 0 : size;
}

static void push(struct client *c, const char *data, size_t size) {
  size_t taken = c->rest_size ? 0 : sent(c, data, size);
  if (taken == size) return;
  c->rest = realloc(c->rest, c->rest_size + size - taken);
  if (!c->rest) exit(1);
  memcpy(c->rest + c->rest_size, data + taken, size - taken);
  c->rest_size += size - taken;
  wait_for_room(c, 1);
}

static void flush(struct client *c) {
  size_t taken = sent(c, c->rest, c->rest_size);
  c->rest_size -= taken;
  memmove(c->rest, c->rest + taken, c->rest_size);
  if (!c->rest_size) wait_for_room(c, 0);
}

/* Writes an event, `size` characters of data; returns its length. */
static size_t event(char *to, long n, long size) {
  int written = sprintf(to, "data: {\"n\":%ld,\"t\":%lld,\"p\":\"", n,
                        (long long)monotonic());
  long fill = size + 6 - written - 2;
  if (fill < 0) fill = 0;
  memset(to + written, 'x', (size_t)fill);
  memcpy(to + written + fill, "\"}\n\n", 4);
  return (size_t)(written + fill + 4);
}

/* Publishes one event, or as many as go into one send. */
static void publish(void) {
  static char body[JOINED + LARGEST], chunk[JOINED + LARGEST + 32];
  size_t size = 0;
  do size += event(body + size, job.n++, job.size);
  while (!job.step && job.n < job.count && size < JOINED);
  int head = sprintf(chunk, "%zX\r\n", size);
  memcpy(chunk + head, body, size);
  memcpy(chunk + head + size, "\r\n", 2);
  for (int i = 0; i < count; i++) push(subscribers[i], chunk, (size_t)head + size + 2);
}

static void answer(struct client *c, const char *text) {
  char response[256];
  int size = snprintf(response, sizeof response,
                      "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n%s", strlen(text),
                      text);
  push(c, response, (size_t)size);
}

static void serve(struct client *c) {
  char text[100], *publish_at = strstr(c->request, "/publish?");
  long rate;
  if (strstr(c->request, "GET /events")) {
    subscribers = realloc(subscribers, (size_t)(count + 1) * sizeof *subscribers);
    if (!subscribers) exit(1);
    c->place = count;
    subscribers[count++] = c;
    push(c, HEAD, sizeof HEAD - 1);
  } else if (publish_at && sscanf(publish_at, "/publish?count=%ld&rate=%ld&size=%ld",
                                  &job.count, &rate, &job.size) == 3) {
    if (job.size > LARGEST - 100) job.size = LARGEST - 100;
    job.n = 0;
    job.next = monotonic();
    job.step = rate ? 1000000000LL / rate : 0;
    answer(c, "ok");
  } else {
    snprintf(text, sizeof text, "{\"pid\": %d, \"subscribers\": %d}", getpid(), count);
    answer(c, text);
  }
}

static void come(int listener) {
  int fd, one = 1;
  while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
    struct client *c = calloc(1, sizeof *c);
    struct epoll_event what = {.events = EPOLLIN, .data.ptr = c};
    if (!c) exit(1);
    c->fd = fd;
    c->place = -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &what);
  }
}

/* Returns whether the client is still there. */
static int hear(struct client *c) {
  ssize_t got = recv(c->fd, c->request + c->size, (size_t)(REQUEST - 1 - c->size), 0);
  if (got < 0 && errno == EAGAIN) return 1;
  if (got <= 0) return leave(c), 0;
  c->size += (int)got;
  c->request[c->size] = 0;
  if (strstr(c->request, "\r\n\r\n")) {
    c->size = 0;
    serve(c);
  } else if (c->size == REQUEST - 1) return leave(c), 0;
  return 1;
}

/* Returns the milliseconds until the next event; publishes those that are due. */
static int due(void) {
  while (job.n < job.count) {
    int64_t left = job.step ? job.next - monotonic() : 0;
    if (left > 0) return (int)(left / 1000000) + 1;
    publish();
    job.next += job.step;
  }
  return -1;
}

int main(int argc, char **argv) {
  static struct epoll_event events[512], first = {.events = EPOLLIN};
  struct rlimit limit;
  if (argc != 2) return 2;
  int listener = atoi(argv[1]);
  signal(SIGPIPE, SIG_IGN);
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  epoll = epoll_create1(EPOLL_CLOEXEC);
  epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &first);
  for (;;) {
    int got = epoll_wait(epoll, events, 512, due());
    for (int i = 0; i < got; i++) {
      struct client *c = events[i].data.ptr;
      if (!c) come(listener);
      else if (events[i].events & ~(uint32_t)EPOLLOUT && !hear(c)) continue;
      else if (c->is_waiting && events[i].events & EPOLLOUT) flush(c);
    }
  }
}
