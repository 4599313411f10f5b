@0xd0c2a1b7f3e94c55;
# The control plane between the core and its sidecars: Cap'n Proto messages over ZeroMQ (ROUTER in the
# core, DEALER in a sidecar), one message a frame. Few and slow; no message is ever sent for an I/O request.
#
# Both sides treat the other's messages as hostile: proto/framing.py bounds them before they are read.

struct Message {
  id @0 :UInt64;
  # Of a request: chosen by the asker, never 0, never used twice on a connection. An answer repeats it.
  # 0 in a notice, which nobody answers.

  deadlineMs @1 :UInt32;
  # Of a request: how long the asker will wait, in milliseconds. 0 in answers and notices.

  union {
    # Requests of a sidecar.
    hello @2 :Hello;

    # Requests of the core.
    activate @3 :Activate;
    reset @4 :Void;
    # Stop every queue, finish or drop what is in flight, touch guest memory no more, forget the driver's
    # settings. Answered when that is so.
    configWrite @5 :ConfigWrite;
    stats @6 :Void;
    ping @7 :Void;
    shutdown @8 :Void;
    # Flush what the host must not lose, close the backend, answer, exit with status 0.

    # Answers.
    ok @9 :Void;
    error @10 :Error;
    welcome @11 :Welcome;
    statsReport @12 :StatsReport;

    # Notices of a sidecar.
    configChanged @13 :ConfigChanged;
    needsReset @14 :NeedsReset;

    # Requests of the core, for snapshots (docs/internals.md, "Snapshots").
    quiesce @15 :Void;
    # Fetch no more, finish and publish what is in flight, take in nothing more from the host. Once answered, nothing
    # of this process touches guest memory or raises an interrupt until `resume`. Asked again: answered again.
    save @16 :Void;
    # While quiesced. Answered by `saved`.
    load @17 :DeviceState;
    # While quiesced and not activated. If `queues` is not empty an `activate` that is `restored` follows.
    resume @18 :Void;
    # Goes on; looks at every queue once, since a notification may have been in flight.

    saved @19 :DeviceState;   # an answer

    populate @20 :Void;
    # To the pager: fill every page of guest memory that comes from the template, then answer.

    inject @21 :Inject;
    # Fail or delay the next requests, for testing guests. Refused by kinds that cannot.

    command @22 :Command;
    # What only this kind understands. Answered by `result`, or by an error; it may take its time.
    result @23 :Text;         # an answer: JSON
  }
}

struct Inject {
  operation @0 :Text;       # any, or of the kind: read, write, flush, discard; rx, tx
  count @1 :UInt32;         # how many; 0: no more from now on
  status @2 :Text;          # what they are answered with: ioerr, unsupp, drop; empty: they are carried out
  delayMs @3 :UInt32;       # how long each waits first
}

struct Command {
  name @0 :Text;
  arguments @1 :Text;       # JSON
}

struct DeviceState {
  # What a sidecar knows that neither the core nor guest memory does.
  version @0 :UInt16;       # of `data`, counted by the kind; what it holds is the kind's
  data @1 :Data;
  queues @2 :List(QueueState);  # of the activated ones; empty: not activated
}

struct QueueState {
  index @0 :UInt16;
  lastAvail @1 :UInt16;     # next entry of the avail ring to take
  usedIdx @2 :UInt16;       # next entry of the used ring to fill
  error @3 :UInt16;         # 0, or why the queue is broken (enum mc_vq_error)
}

struct Hello {
  protocolVersion @0 :UInt16;
  deviceId @1 :Text;        # the id in machine.yaml, as in Boot
  pid @2 :UInt32;
  virtioType @3 :UInt32;    # virtio device id (virtio 1.2, section 5); 0: not a virtio device (the 16550)
  features @4 :UInt64;      # offered feature bits, without those of the transport
  queueSizes @5 :List(UInt16);  # the largest size of each queue, a power of two
  config @6 :Data;          # device configuration space
  wholeMemory @7 :Bool;
  # A process that the pager does not serve reads guest memory: all of it must be there before this device runs.
  configKinds @8 :Data;     # a byte for each byte of it; missing ones are 0:
  # 0, the sidecar's own: it says what it is at any time. 1, the device's state: the sidecar changes it, and the core keeps it
  # for the next process in its place, after a restore or a death. 2, written by the driver: kept likewise, but the core
  # itself puts down what the driver writes, and 0 at a reset; configWrite tells the sidecar.
}

struct Welcome {
  protocolVersion @0 :UInt16;
}

struct Queue {
  index @0 :UInt16;
  size @1 :UInt16;          # as the driver set it: a power of two, 1 to the largest offered
  desc @2 :UInt64;          # guest physical addresses
  driver @3 :UInt64;        # avail ring
  device @4 :UInt64;        # used ring
  lastAvail @5 :UInt16;     # where to go on; 0 unless the activation is `restored`
  usedIdx @6 :UInt16;
  error @7 :UInt16;         # enum mc_vq_error of a queue that is broken already: it is not touched
}

struct Activate {
  features @0 :UInt64;      # what the driver accepted
  queues @1 :List(Queue);   # only those that the driver made ready
  restored @2 :Bool;        # the driver set this up before a snapshot; nothing happens until `resume`
  config @3 :Data;          # configuration space as the core has it, if any of it has a kind
  activation @4 :UInt64;
  # The core's number for this set-up of the driver's, which no other has; 0: none is kept. To a sidecar that takes the
  # place of another it says whether the in-flight regions speak of this set-up, and so are where to go on.
}

struct ConfigWrite {
  offset @0 :UInt32;
  data @1 :Data;
}

struct ConfigChanged {
  data @0 :Data;            # the whole configuration space as it is now
}

struct NeedsReset {
  queue @0 :UInt16;         # 0xffff: not about one queue
  reason @1 :Text;
}

struct Error {
  code @0 :Code;
  text @1 :Text;
  enum Code {
    generic @0;
    version @1;             # the peer speaks a protocol version that we do not
    state @2;               # not legal in the device's present state
    invalid @3;             # a field is out of its bounds
    unknown @4;             # a request that this peer does not know
  }
}

struct StatsReport {
  queues @0 :List(QueueStats);
  detail @1 :List(Counter); # what only this kind counts
}

struct Counter {
  name @0 :Text;
  value @1 :UInt64;
}

struct QueueStats {
  index @0 :UInt16;
  requests @1 :UInt64;      # chains completed
  bytesIn @2 :UInt64;       # from the guest
  bytesOut @3 :UInt64;      # to the guest
  errors @4 :UInt64;        # requests answered with an error
  kicks @5 :UInt64;         # wake-ups by the guest
  interrupts @6 :UInt64;    # interrupts raised
  suppressed @7 :UInt64;    # interrupts that EVENT_IDX or NO_INTERRUPT spared the guest
  taken @8 :UInt64;         # chains taken
  inFlight @9 :UInt64;      # taken and not yet completed, now
  latencyNs @10 :UInt64;    # from take to completion, the sum in ns,
  latency @11 :List(UInt64);  # and how often: element n counts 2^n to 2^(n+1) - 1 ns, the last what is longer, too
}
