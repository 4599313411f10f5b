/* A device's own handler, as docs/write-a-sidecar.md describes it: nothing of Motorcade's is included. It sends back what
 * it is sent with every byte one higher; what begins with a NUL is a bad request, a queue is asked again after a wake as
 * long as *opaque is not 0, and 0xff claims to have written more than there was room for. */
#include <stdint.h>
#include <sys/uio.h>

int64_t handler(void *opaque, uint32_t queue, const struct iovec *iov, uint32_t n_out, uint32_t n_in)
{
	volatile uint32_t *later = opaque;
	const uint8_t *from;
	uint8_t *to;
	uint32_t i;

	(void)queue;
	if (*later)
		return -2;
	if (n_out != 1 || n_in != 1)
		return -1;
	from = iov[0].iov_base;
	to = iov[1].iov_base;
	if (from[0] == 0)
		return -1;
	if (from[0] == 0xff)
		return INT64_MAX;
	for (i = 0; i < iov[0].iov_len && i < iov[1].iov_len; i++)
		to[i] = from[i] + 1;
	return i;
}
